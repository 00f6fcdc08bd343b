"""SHA-256 prefixes of the Game of 24 number multisets that are never trained on.

They are rows 901 to 1000 of the list on which Tree of Thoughts reports (Yao et al., 2023, arXiv 2305.10601), kept as
hashes of "game24:a b c d" with the numbers sorted: enough to hold a puzzle out, without shipping the list.
"""

__all__ = ["GAME24_SHA256_PREFIXES"]

GAME24_SHA256_PREFIXES = frozenset(
    # one text and not a list of 100: a third of the lines
    """
    031b6418f611 051affb8d737 05f2ddc7b49b 0baef9d59785 0e2a535fb68d 112b0036e8b5 134eb7b439c8 15085d3443a5
    18f5d8071609 1c8aa594402b 1ca3fb80d548 21ffb8dc5f5c 28169c23fe5d 28c1345c0050 2c83dd464542 2e5e3c9e9b1a
    2fd1c2111d30 391b16849255 3b61db42cab2 3f545f7d0ec6 406379d5b354 40d30471a278 40eb4f618f02 40ec192e3fe4
    4237d0b65de8 4632afacd9f9 49152bc21857 49954514845e 4b3425e5f1f0 4c42836ddeec 4c9383e017f1 4dca51ff3fe6
    4f07e389cfab 4f76a8b30f32 50a09c8680eb 5172a5e79d8a 52d881baa650 5496f2a7fb5e 590bd199df26 5b9b955badf6
    5c8f74a14129 61c15a2df601 61fe709eea6f 63d3a6127468 66cb29a108af 6a7cc4626ffa 6da30f1cf694 706a4bfb9d8a
    7432dd5863e7 78b49f23c137 7a7fab9051ce 7acd1b12a5f5 7b6f46016f50 7da008705e0d 81786334e2d1 894f54289f5a
    8b228aaf5dd1 8cb3379c435b 95c76375254d 9a097250cd30 9c870d5eb953 9fa1251bf025 a3c2282a2599 a440bf3ad87f
    a4af2a82d02a a4f6bf04d676 a763a85428c2 a7d6f31e0423 a811d0eb1e59 a976ac18facb ac9f11808732 b0d7d4768f40
    b180cb053bbf b1ed630a5c98 badeb6e653ec bc5c31b9805d bca87ec17d64 bcee167d1b9f be2af380b7f9 bf269b410bd3
    bfaf31000c36 c395b15bb31f c3fee4e66ea5 c6b4bb69caae c7e4eee465b3 c93994d60e43 c96f6d695b72 d19ccf0f5984
    d209c332e0bf d8c0fd2f8990 ecf97d9b0d89 ef065d028382 f06026e22246 f40bd22d682c f45ade1cd258 f4da4b4ea851
    f4f3381a0f4e f735404e6788 fad7437dd77a fd72e6be841d
    """.split()  # noqa: SIM905
)
