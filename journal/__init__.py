"""What happened to an image: events, the log, before-images, history, identity. Knows no image format."""
