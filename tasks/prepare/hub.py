"""Rows of a data set of the Hugging Face hub, or of its local cache where there is no network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.params import Source
from tasks.stage import UserError


def rows_of_hub(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row). The commit is fetched once into the hub's cache; no code of the data set is run."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    assert source.hub
    assert source.revision
    name = f"{source.hub} at {source.revision[:8]}"
    number = 0
    try:
        folder = snapshot_download(source.hub, repo_type="dataset", revision=source.revision)
    except HFValidationError as error:
        raise UserError(f"data.sources: {error}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the data set {name} cannot be fetched: {reason}\nCheck its name, the commit and the network; a private "
            "one needs a token in HF_TOKEN."
        ) from None
    try:
        # streaming: the rows need no second copy in the format of `datasets`
        rows = datasets.load_dataset(folder, name=source.subset, split=source.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield number, {key: value for key, value in row.items() if value is not None}
    except Exception as error:  # whatever its readers meet: OSError, EOFError, zlib.error, BadZipFile, TypeError ...
        raise UserError(
            f"the data set {name}: row {number + 1} cannot be read: {type(error).__name__}: {str(error).strip()}\n"
            "Check `split` and `subset`. Else a file of it is empty, damaged or of a kind that `datasets` cannot read: "
            "see whether its authors have mended it in a later commit."
        ) from None
    if number == 0:
        raise UserError(f"the data set {name} holds no rows in the split {source.split}.")
