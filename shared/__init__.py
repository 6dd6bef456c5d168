"""What the papers share and another lab would replace by its own: runs, checkpoints, command line, loaders."""
