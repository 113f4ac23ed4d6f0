package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manCmd writes the manual's pages, for packages. SOURCE_DATE_EPOCH is their date.
func (c *cli) manCmd() *cobra.Command {
	return &cobra.Command{
		Use: "man DIRECTORY", Short: "Write the manual's pages, one for each command", Args: exactly(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			at := time.Now()
			if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
				sec, err := strconv.ParseInt(s, 10, 64)
				if err != nil {
					return fmt.Errorf("SOURCE_DATE_EPOCH %q: want seconds since 1970", s)
				}
				at = time.Unix(sec, 0).UTC()
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			root.InitDefaultCompletionCmd()
			return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Shoal " + versionString(), Manual: "Shoal", Date: &at}, args[0])
		},
	}
}
