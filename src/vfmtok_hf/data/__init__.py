"""Read and write images and tokens: readers, folders, data sets, loaders, token sets, output files."""
