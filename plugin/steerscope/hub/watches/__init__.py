"""What consumers are told as it happens, from now on or from where a cursor says."""
