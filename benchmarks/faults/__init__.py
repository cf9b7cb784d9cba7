"""What becomes of hostile input, of a full disk, of kills, and of two runs on one directory."""
