"""The page, its Markdown and its JSON."""
