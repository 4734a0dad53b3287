"""Whole clusters measured: starts `baton serve` in one layout after the other and puts the same loads on each."""
