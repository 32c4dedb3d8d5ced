"""The registry of models. A new kind of model is one function decorated with `register`."""

from common.models import imaging as imaging  # they register their models
from common.models import molecule as molecule
from common.models import multimodal as multimodal
from common.models import sequence as sequence
from common.models import tabular as tabular
from common.models import text as text
from common.models.registry import (
    Shape,
    build_model,
    parameter_arrays,
    parameter_count,
    register,
    registered,
    study_model,
)

__all__ = [
    "Shape",
    "build_model",
    "parameter_arrays",
    "parameter_count",
    "register",
    "registered",
    "study_model",
]
