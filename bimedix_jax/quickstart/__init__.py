"""The quickstart: the job, its tiny model, its report page and its base model."""
