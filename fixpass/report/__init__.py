"""What people and programs read about a compile: sentences, expectations, text, HTML."""
