"""Train the tokenizer on the downloaded documents."""

from __future__ import annotations

from config.command import Overrides, PrintConfig, Recipe, command_line, progress, resolve, run


def train_tokenizer(overrides: Overrides = None, recipe: Recipe = None, print_config: PrintConfig = False) -> None:
    """Train a tokenizer on the sources in data.use and save it in corpus/tokenizer/.

    data.tokenizer.kind chooses byte-level BPE or SentencePiece, data.tokenizer.vocab_size the number of tokens. A
    tokenizer that is there already stays in use until the new one is finished. Needs data/download_datasets.py to
    have run, unless the sources are streamed.
    """
    config = resolve(recipe, overrides, print_config)
    from config.files import local
    from data.listing import check_names
    from data.tokenization.build import build, current_fingerprint
    from data.tokenization.report import print_report

    check_names(config.data.use, config.data)
    directory = local(config.data.tokenizer_dir, "data.tokenizer_dir")
    before = current_fingerprint(directory)
    with progress() as bars:
        reading = bars.add_task("Reading documents", total=None)

        def show(done: int, total: int | None) -> None:
            if total is None:
                bars.add_task("Learning tokens", total=None)
            bars.update(reading, completed=done, total=total)

        built = build(config, show)
    built.tokenizer.save(directory)
    print_report(built, config.data.tokenizer, before)
    print(f"Wrote {directory}\nNext: {command_line('data/preprocess.py', recipe, overrides)}")


def main() -> None:
    """Run the command."""
    run(train_tokenizer)


if __name__ == "__main__":
    main()
