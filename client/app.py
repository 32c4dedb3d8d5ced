"""The hospital's Flower ClientApp: hands each message to the vault and its answer back.

It runs beside the network, so it holds no data, knows no study and loads neither torch nor opacus.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.door import vault_for
from common.errors import FedwardError

RECORD, FIELD, STYPE = "fedward", "message", "safetensors"

app = ClientApp()


def request_of(message: Message) -> bytes:
    """What a message asks the vault; a simulation hands it over by reference.

    Raises:
        KeyError, AttributeError, TypeError: if it isn't fedward's.
    """
    content: bytes = message.content[RECORD][FIELD].data
    return content


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Forward `message` to this node's vault.

    Raises:
        RuntimeError: with the error's name only, because Flower shows the text to the coordinator.
    """
    try:
        reply = vault_for(context.node_config)(request_of(message))
    except FedwardError as error:
        raise RuntimeError(f"fedward: {error.code}") from None
    except Exception as error:
        raise RuntimeError(f"fedward: {type(error).__name__}") from None
    record = ArrayRecord()  # given to its constructor, Flower would copy the array
    record[FIELD] = Array("uint8", (len(reply),), STYPE, reply)
    return Message(RecordDict({RECORD: record}), reply_to=message)
