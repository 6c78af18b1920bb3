"""How the embedded model ``pocket`` is made: its texts, its tokenizer, its teacher's targets, its start and its card.

Needed only to make it again (jobs/pocket.py); the package installs without it.
"""
