"""Explicit-state search over a model world that runs the real `prefill_step` and `decode_step`.

`python -m tests.transfer.explorer` walks the standard configurations; `test_explorer.py` and `test_mutants.py` use it.
See `README.md` beside this file for what is modelled, what is checked and how the search is kept small.
"""
