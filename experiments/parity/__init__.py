"""The same function as the originals: every model compared, stage by stage."""
