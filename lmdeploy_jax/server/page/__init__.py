"""What the chat page needs of the server beside the protocols: its files, and answers as HTML."""
