"""What both engines share: documents that wait, their handles, the thread, memory."""
