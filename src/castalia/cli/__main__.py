"""`python -m castalia.cli`: the same as the `castalia` command."""

from castalia.cli import main

raise SystemExit(main())
