"""Pictures of video files as players show them."""
