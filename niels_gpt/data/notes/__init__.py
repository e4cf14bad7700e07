"""Your own notes, made safe to learn from: read, cleaned, secrets masked, duplicates dropped, kept apart by split."""
