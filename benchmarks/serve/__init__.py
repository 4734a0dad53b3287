"""`baton bench serve`: an open- and closed-loop load client for any OpenAI-compatible server.

Uses only the public HTTP API, so that Baton and its peers are measured by the same client.
`command` is the command line, `session` runs what it asks for, `metrics` says what is measured.
"""
