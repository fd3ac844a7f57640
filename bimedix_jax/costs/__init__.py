"""What a model computes, and what devices can do: counted FLOPs, and peaks from data sheets."""
