package imagefile

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"slices"
	"testing"
)

// TestArchive reads back what containerd and Docker load: a manifest that names the parts,
// and a configuration that names the layer by what it is.
func TestArchive(t *testing.T) {
	i, err := New("amd64", map[string]any{"Entrypoint": []string{"/p"}}, File{Name: "bin", Mode: 0o755}, File{Name: "empty", Mode: 0o644, Data: []byte{}}, File{Name: "p", Mode: 0o755, Data: []byte("program")})
	if err != nil {
		t.Fatal(err)
	}
	b, err := i.Archive("p:1")
	if err != nil {
		t.Fatal(err)
	}
	parts, _ := unpack(t, b)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(parts["manifest.json"], &manifest); err != nil || len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{"p:1"}) || len(manifest[0].Layers) != 1 {
		t.Fatalf("%s: %v", parts["manifest.json"], err)
	}
	var config struct {
		Architecture, OS string
		Config           struct{ Entrypoint []string }
		RootFS           struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	layer := parts[manifest[0].Layers[0]]
	if err := json.Unmarshal(parts[manifest[0].Config], &config); err != nil || config.Architecture != "amd64" || config.OS != "linux" ||
		!slices.Equal(config.Config.Entrypoint, []string{"/p"}) || !slices.Equal(config.RootFS.DiffIDs, []string{"sha256:" + Sum(layer)}) {
		t.Errorf("%+v, %v", config, err)
	}
	files, kinds := unpack(t, layer)
	if string(files["p"]) != "program" || kinds["bin"] != tar.TypeDir || kinds["empty"] != tar.TypeReg {
		t.Errorf("%q, %v", files, kinds)
	}
}

func unpack(t *testing.T, b []byte) (map[string][]byte, map[string]byte) {
	t.Helper()
	data, kinds := map[string][]byte{}, map[string]byte{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return data, kinds
		}
		if err != nil {
			t.Fatal(err)
		}
		kinds[h.Name] = h.Typeflag
		if data[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}
