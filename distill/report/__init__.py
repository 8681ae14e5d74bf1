"""The comparison report: reads run directories, never models, so that it can be made again wherever the files are."""
