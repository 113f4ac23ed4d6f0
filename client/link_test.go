package client

import (
	"slices"
	"testing"
)

// TestLinkVariables: what Docker's manual shows for "docker run --name web2
// --link db:db", a second protocol, and a range.
func TestLinkVariables(t *testing.T) {
	got := linkVariables("web2", "db", "172.17.0.5", []string{"5433", "53/udp", "5432", "5434/tcp", "5432/tcp", "80"}, []string{"PGVERSION=9.3", "HOME=/", "EMPTY="})
	want := []string{
		"DB_PORT=tcp://172.17.0.5:80",
		"DB_PORT_80_TCP=tcp://172.17.0.5:80", "DB_PORT_80_TCP_ADDR=172.17.0.5", "DB_PORT_80_TCP_PORT=80", "DB_PORT_80_TCP_PROTO=tcp",
		"DB_PORT_5432_TCP=tcp://172.17.0.5:5432", "DB_PORT_5432_TCP_ADDR=172.17.0.5", "DB_PORT_5432_TCP_PORT=5432", "DB_PORT_5432_TCP_PROTO=tcp",
		"DB_PORT_5433_TCP=tcp://172.17.0.5:5433", "DB_PORT_5433_TCP_ADDR=172.17.0.5", "DB_PORT_5433_TCP_PORT=5433", "DB_PORT_5433_TCP_PROTO=tcp",
		"DB_PORT_5434_TCP=tcp://172.17.0.5:5434", "DB_PORT_5434_TCP_ADDR=172.17.0.5", "DB_PORT_5434_TCP_PORT=5434", "DB_PORT_5434_TCP_PROTO=tcp",
		"DB_PORT_5432_TCP_START=tcp://172.17.0.5:5432", "DB_PORT_5432_TCP_PORT_START=5432", "DB_PORT_5432_TCP_END=tcp://172.17.0.5:5434", "DB_PORT_5432_TCP_PORT_END=5434",
		"DB_PORT_53_UDP=udp://172.17.0.5:53", "DB_PORT_53_UDP_ADDR=172.17.0.5", "DB_PORT_53_UDP_PORT=53", "DB_PORT_53_UDP_PROTO=udp",
		"DB_NAME=/web2/db",
		"DB_ENV_PGVERSION=9.3", "DB_ENV_EMPTY=",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := linkVariables("w", "my-db", "", []string{"80"}, nil); !slices.Equal(got, []string{"MY_DB_NAME=/w/my-db"}) {
		t.Errorf("without an address: %q", got)
	}
}
