"""Uploads a written Hugging Face folder to the hub."""

import pathlib

from solar_jax.errors import UserError


def push(folder: pathlib.Path, repo: str) -> str:
    """Uploads all files of a folder to a repository, which is created if missing.

    Returns:
      The model's address.

    Raises:
      UserError: the hub refuses it; the folder stays as it is.
    """
    import huggingface_hub  # imported here: slow, and few conversions are uploaded

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload by solar_jax")
    except Exception as e:  # the client raises a dozen unrelated types
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"--push_to_hub={repo}: the hub refuses it ({type(e).__name__}: {reason}); {folder} is complete, and `hf "
            f"upload {repo} {folder}` tries again."
        ) from e
    return str(url)
