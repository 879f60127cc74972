"""What a sampling run does around the pipeline: prompts, shares of many processes, files."""
