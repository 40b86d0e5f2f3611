"""`python -m rlexit` is the console command `rlexit`."""

from __future__ import annotations

from rlexit.cli import main

raise SystemExit(main())
