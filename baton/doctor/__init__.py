"""`baton doctor`: what of a machine would keep Baton from serving, or from serving well, and what to change."""
