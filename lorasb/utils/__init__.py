"""Small tools without torch models: files, sizes, plots, precision. They use nothing else of the package."""
