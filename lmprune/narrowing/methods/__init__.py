"""Methods of width, a file each."""
