"""Network families; importing this package registers every model with timm."""
