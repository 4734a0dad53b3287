"""A process of its own for what a request could use to stop the event loop: large bodies and chat templates.

`pool.py` is the router's side; `process.py` is the other process, which alone imports `environment.py`.
"""
