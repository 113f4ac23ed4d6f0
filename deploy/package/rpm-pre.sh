getent group shoal >/dev/null || groupadd --system shoal
