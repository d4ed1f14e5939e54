"""What every room uses: files, folders, reading, checks, provenance."""
