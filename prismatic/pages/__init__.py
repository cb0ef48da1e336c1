"""Pages for a browser, and their templates."""
