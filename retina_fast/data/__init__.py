"""Data sets in the COCO and Pascal VOC formats: reading, checking, augmenting and measuring."""
