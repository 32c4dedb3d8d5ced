"""A site's vault with seeded noise, which no command of fedward offers: python seeded_vault.py SITE SEED"""

from __future__ import annotations

import sys
from pathlib import Path

from client.service import serve
from client.settings import SiteFolder
from client.site import open_vault
from common.privacy.noise import Seeded

site = SiteFolder(Path(sys.argv[1]))
serve(
    open_vault(site, randomness=Seeded(int(sys.argv[2]))), site.socket_path, allow_seeded=True
).wait_for_termination()
