"""What a page is made of: tables, charts, numbers and names as words."""
