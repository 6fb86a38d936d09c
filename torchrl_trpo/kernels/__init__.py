"""Functions of many independent rows, compiled into one loop over the rows."""
