"""Where an image comes from, written into the file and found again: metadata, an invisible watermark, a signature."""
