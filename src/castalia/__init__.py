"""Castalia: train autoregressive language models from scratch, and see that they are right.

The Python interface (docs/contracts.md, section 6) is imported lazily, so that
`import castalia` and `castalia --help` stay quick.
"""

__version__ = "0.1.0"
