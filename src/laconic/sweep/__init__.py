"""Studies: one recipe varied along axes; every variant is compressed and measured once."""
