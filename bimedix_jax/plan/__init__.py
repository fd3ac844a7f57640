"""`bimedix plan`: compiles the real steps for absent hardware, and says what they need and how long they take."""
