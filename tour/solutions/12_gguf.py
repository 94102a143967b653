import struct


def decode(raw: bytes) -> list[float]:
    d, dmin = struct.unpack("<ee", raw[:4])
    scales = [raw[4 + g] & 63 for g in range(4)] + [raw[12 + g] & 15 | raw[4 + g] >> 6 << 4 for g in range(4)]
    minima = [raw[8 + g] & 63 for g in range(4)] + [raw[12 + g] >> 4 | raw[8 + g] >> 6 << 4 for g in range(4)]
    weights = []
    for group in range(8):
        for i in range(32):
            byte = raw[16 + 32 * (group // 2) + i]
            code = byte >> 4 if group % 2 else byte & 15
            weights.append(d * scales[group] * code - dmin * minima[group])
    return weights
