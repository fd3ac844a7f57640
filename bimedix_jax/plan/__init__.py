"""`bimedix plan`: compiles the real steps for absent hardware and estimates their memory, communication and time."""
