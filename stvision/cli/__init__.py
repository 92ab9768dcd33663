"""The ``stvision`` command: one module a subcommand, listed here and imported only when chosen."""

#: subcommand -> (module with a dataclass ``Command`` and a function ``run``, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("stvision.cli.predict", "predict a video from a frame and a sentence"),
    "train": ("stvision.cli.train", "train a model from a configuration file"),
    "convert": ("stvision.cli.convert", "turn published weights into a pipeline or backbone"),
    "data": ("stvision.cli.data", "render or inspect a set of clips"),
    "eval": ("stvision.cli.eval", "score predictions against real clips"),
    "bench": ("stvision.cli.bench", "compare mechanisms: accuracy, time, memory"),
    "tune": ("stvision.cli.tune", "find the fastest attention kernel shapes for a problem"),
    "env": ("stvision.cli.env", "show versions, devices and what each optional backend says"),
}

#: subcommand -> what helps where memory runs out
MEMORY_ADVICE: dict[str, str] = {
    "predict": "give --memory 8GB, which picks offload, chunk sizes and precision for that much, or "
    "a smaller --size, fewer --num-frames or --dtype bfloat16",
    "eval": "give a smaller --batch-size or --size",
    "convert": "give --dtype float16",
    "data": "give fewer --workers",
    "bench": "give fewer --workers or a smaller --time-batch",
}
