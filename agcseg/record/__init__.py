"""What a run leaves on disk: who may write into its folder, and the files in it."""
