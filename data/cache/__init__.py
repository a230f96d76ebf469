"""Compressed visual tokens of images, computed once (`python -m data.cache`) and read by every epoch, run and rank.

Selection does not look at the text, so tokens are a function of the image, the encoder and the ZipConfig. A folder says in
`cache.json` of which (`identity`), and each of its shards names that file's digest; a run with others is refused.

| file | subject |
|---|---|
| `identity.py` | what a cache was made with |
| `shards.py` | the files that contain the tokens |
| `store.py` | all shards of a folder under one index |
| `keys.py` | under which keys the tokens of an image are found |
| `media.py` | which images a config has, read for the encoder |
| `build.py` | encode, compress, write |
| `reader.py` | what a data set reads in place of pixels |
"""

from data.cache.identity import CacheError, check_identity, claim, identity

__all__ = ["CacheError", "check_identity", "claim", "identity"]
