"""Images and tokens outside of memory: readers, folders, datasets, loaders, token sets, output files."""
