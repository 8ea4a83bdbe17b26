"""`python -m castalia`: the same as the `castalia` command."""

from castalia.cli import main

raise SystemExit(main())
